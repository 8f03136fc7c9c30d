"""Use a network in eval mode while its own mode stays as it is, so that other threads can go on using it."""

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def eval_copy(module: Module) -> Module:
    """Return a copy in eval mode that shares parameters, buffers and hooks; parts that are in eval mode are not copied.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> copy = eval_copy(norm)
        >>> norm.training, copy.training, copy.weight is norm.weight
        (True, False, True)
    """
    if not any(part.training for part in module.modules()):
        return module
    copy = module.__new__(type(module))  # no __init__, and no copy protocol: some modules refuse to be copied
    copy.__dict__.update(module.__dict__)
    copy._modules = {name: None if part is None else eval_copy(part) for name, part in module._modules.items()}
    copy._compiled_call_impl = None  # compiled for the original
    copy.training = False
    return copy
