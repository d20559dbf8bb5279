"""Train with GAM: a closure that returns the loss, and nothing else changes."""

import torch
from torch.nn.functional import cross_entropy

from gradwise.regularization import GAM, first_order_flatness
from gradwise.testbeds import digits

bed = digits(seed=0, n_train=500)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = GAM(base, rho=0.2, normalize="mean", model=model)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, 200)

for step in range(200):
    rows = torch.arange(64) + 64 * step
    x, y = bed.train.x[rows % 500], bed.train.y[rows % 500]
    loss = optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))
    scheduler.step()

accuracy = (model(bed.test.x).argmax(1) == bed.test.y).float().mean()


def training_loss() -> torch.Tensor:
    return cross_entropy(model(bed.train.x), bed.train.y)


flatness = first_order_flatness(training_loss, list(model.parameters()), rho=0.1)
print(f"last loss {loss:.3f}, test accuracy {accuracy:.3f}, first-order flatness {float(flatness):.3f}")
