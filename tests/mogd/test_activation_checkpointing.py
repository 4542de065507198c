"""``torch.utils.checkpoint``: activations made anew in each backward pass change no bit."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogd import UnbiasedMultiGradient

STEPS = 5


class Network(nn.Module):
    """Two blocks, whose activations may be made anew, and two heads."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)]
        )
        self.heads = nn.ModuleList([nn.Linear(3, 2) for _ in range(2)])
        self.again = again
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self.run, block, x, use_reentrant=False) if self.again else block(x)
        return x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        self.passes += 1
        return block(x)


def sharing(model: Network, x: Tensor) -> list[Tensor]:
    hidden = model(x)
    first, second = (head(hidden) for head in model.heads)
    return [(first - x[:, :2]).square().mean(), (second + 2 * x[:, :2]).square().mean()]


def one_by_one(model: Network, x: Tensor):
    yield (model.heads[0](model(x)) - x[:, :2]).square().mean()
    yield (model.heads[1](model(x)) + 2 * x[:, :2]).square().mean()


def trained(losses, again: bool) -> tuple[Network, UnbiasedMultiGradient]:
    model = Network(again)
    optimizer = UnbiasedMultiGradient(model.parameters(), torch.optim.Adam, lr=0.05)
    for step in range(STEPS):
        torch.manual_seed(step)  # of the data and of the dropout
        x = torch.randn(8, 3)
        optimizer.step(lambda x=x: losses(model, x))
    return model, optimizer


@pytest.mark.parametrize("losses", [sharing, one_by_one])
def test_activations_made_anew_change_nothing(losses):
    plain, expected = trained(losses, again=False)
    model, optimizer = trained(losses, again=True)
    torch.testing.assert_close(
        list(model.parameters()), list(plain.parameters()), rtol=0.0, atol=0.0
    )
    torch.testing.assert_close(optimizer.state_dict(), expected.state_dict(), rtol=0.0, atol=0.0)
    # of two blocks: forward passes and one more for each backward pass
    forwards = 1 if losses is sharing else 2
    assert model.passes == STEPS * 2 * (forwards + 2)
