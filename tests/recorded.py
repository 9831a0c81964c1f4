"""A CUDA graph without a GPU: the same operations on the same memory, once recorded, then repeated.

What a graph gets wrong a recording gets wrong as well: a value of Python that changes later is
baked in, a tensor that is allocated anew is read at its old place, and an operation that looks at a
value, has a result whose size depends on one, or makes a tensor of numbers of Python, which a GPU
would have to fetch, cannot be recorded. What a graph does with streams and memory it does not show.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LOOKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.item.default, aten.lift_fresh.default, aten.is_nonzero.default, aten.equal.default}


class Recording(TorchDispatchMode):
    """Records every operation with its arguments and results while it is the context."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LOOKS or any(x.dtype == torch.bool for x in indices(func, args)):
            raise RuntimeError(f"{func} cannot be captured: the host would have to wait for it")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tensors(result), tensors(func(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


def indices(func, args):
    """The index tensors of an operation that takes some."""
    name = func.overloadpacket
    return [x for x in args[1] if x is not None] if name in (aten.index, aten.index_put_) else []


def tensors(result):
    results = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in results if isinstance(x, torch.Tensor)]


def captured(replays):
    """What takes the place of the scripts' captured(); appends to replays whenever one is made."""
    def capture(fn, args, device, *changed):
        if not args.fast:
            return fn
        recordings = {}

        def replay(*key):
            if key not in recordings:
                state = [x for part in changed for x in leaves(part.state_dict())]
                before = [x.clone() for x in state]
                fn(*key)  # warms up
                with Recording() as recording:
                    recordings[key] = recording, fn(*key)
                for x, old in zip(state, before):  # capturing computes nothing
                    x.copy_(old)
            recording, result = recordings[key]
            recording.replay()
            replays.append(key)
            return result

        return replay

    return capture


def leaves(tree):
    if isinstance(tree, (dict, list, tuple)):
        branches = tree.values() if isinstance(tree, dict) else tree
        return [x for branch in branches for x in leaves(branch)]
    return [tree.detach()] if isinstance(tree, torch.Tensor) else []
