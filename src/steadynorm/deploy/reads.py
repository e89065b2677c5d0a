"""What counts as a use of a tensor while a model is watched."""

from typing import Any

# What Python asks of a tensor without reading its values.
METADATA = {
    *("size", "dim", "ndimension", "stride", "storage_offset", "numel", "nelement", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "is_same_size", "__len__", "__hash__"),
}
# What gives another view of a tensor, or a copy: the operators that run below say which, and whether any value is read.
RESHAPES = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "contiguous", "expand", "expand_as"),
    *("transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "ravel"),
    *("__getitem__", "select", "narrow", "chunk", "split", "unbind", "tensor_split", "__iter__"),
}
PROPERTIES = {
    *(
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "grad_fn",
        "is_leaf",
        "names",
        "itemsize",
        "nbytes",
    ),
    *("is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_nested"),
    *("is_sparse_csr", "is_xla", "is_ipu", "is_maia", "is_mtia", "is_vulkan", "output_nr", "_version"),
    *("_backward_hooks", "T", "mT"),
}
# Views by place in memory, and of the bits: where a value lies in them depends on more than its index.
RAW_VIEWS = {"as_strided", "view_as_real", "view_as_complex"}


def is_read_by_function(func: Any) -> bool:
    """Whether a call from Python may read or change values without an operator that is seen below."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in PROPERTIES
    return name not in METADATA and name not in RESHAPES


def is_read_by_operator(func: Any) -> bool:
    """Whether an operator reads or changes values: all but views by index do."""
    if not getattr(func, "is_view", False):
        return True
    packet = func.overloadpacket.__name__
    return packet in RAW_VIEWS or func._overloadname == "dtype"


def name_of(func: Any) -> str:
    """What a function of torch is called; a property by its own name, an operator without its namespace."""
    if hasattr(func, "overloadpacket"):
        return str(func).removesuffix(".default").removeprefix("aten.")
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name
