"""A subject of one's own. Run: gradwise diagnose examples/own_model.py:subject --with-trial --report report.html"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from gradwise import Subject

generator = torch.Generator().manual_seed(0)
x = torch.randn(600, 20, generator=generator)
y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()

subject = Subject(
    name="interactions",
    model=lambda: torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)),
    loss=torch.nn.functional.cross_entropy,
    train=DataLoader(TensorDataset(x[:400], y[:400]), batch_size=32, shuffle=True),
    valid=DataLoader(TensorDataset(x[400:], y[400:]), batch_size=200),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    epochs=10,
)
