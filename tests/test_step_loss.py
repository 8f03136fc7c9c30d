import pytest
import torch

from early_fusion_seg.errors import UserError
from early_fusion_seg.step_loss import StepLoss


def test_gradients_are_rescaled_to_the_loss_of_all_pixels_of_a_step():
    parameter = torch.nn.Parameter(torch.ones(()))
    losses, weights = torch.tensor([2.0, 5.0, 11.0]), torch.tensor([1.0, 0.0, 3.0])
    step = StepLoss(batches=3)
    for loss, weight in zip(losses, weights, strict=True):
        (step.add(loss * parameter, weight, ["a"]) / 3).backward()  # like a trainer that averages over 3 batches
    assert step.finish([parameter], 0).item() == pytest.approx((2 * 1 + 11 * 3) / 4)
    assert parameter.grad.item() == pytest.approx((2 * 1 + 11 * 3) / 4)


def test_a_step_without_labeled_pixels_has_zero_gradients():
    parameter = torch.nn.Parameter(torch.ones(()))
    step = StepLoss(batches=2)
    step.add(0.0 * parameter, torch.tensor(0.0), ["a"]).backward()
    assert step.finish([parameter], 0).item() == 0
    assert parameter.grad.item() == 0


def test_a_loss_that_is_not_finite_raises_an_error_that_names_only_the_images_of_its_batch():
    step = StepLoss(batches=2)
    step.add(torch.tensor(1.0), torch.tensor(1.0), ["good"])
    step.add(torch.tensor(torch.nan), torch.tensor(1.0), ["bad", "worse"])
    with pytest.raises(UserError, match="loss is nan at step 7, on the images bad, worse;"):
        step.finish([], 7)
