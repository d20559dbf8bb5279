"""Explain a digit classifier: where is the evidence, and do the attributions add up?"""

import torch
from torch.nn.functional import cross_entropy

from gradwise.attribution import IDGI, IntegratedGradients
from gradwise.testbeds import digits

bed = digits(seed=0, shape="image", scale="unit")
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(100):
    optimizer.zero_grad()
    cross_entropy(model(bed.train.x), bed.train.y).backward()
    optimizer.step()

images, labels = bed.test.x[:16], bed.test.y[:16]
attributions, gap = IntegratedGradients(model).attribute(images, target=labels, tol=0.01, return_convergence_delta=True)
print(f"integrated gradients: largest completeness gap {gap.abs().max():.4f}")

maps = IDGI(IntegratedGradients(model)).attribute(images, target=labels, n_steps=16)
change = model(images).gather(1, labels[:, None]) - model(torch.zeros_like(images)).gather(1, labels[:, None])
print(f"IDGI from 16 steps:   largest completeness gap {(maps.sum((1, 2, 3)) - change[:, 0]).abs().max():.1e}")
