"""Operations of PyTorch, by what they do to channels."""

from torch import fx

#: Each entry by itself, and zero stays zero.
ZERO_PRESERVING = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "hardswish", "hardtanh", "elu", "selu", "celu",
    "tanh", "softsign", "softshrink", "hardshrink", "tanhshrink", "dropout", "dropout1d", "dropout2d", "alpha_dropout", "abs",
    "neg", "square", "sqrt", "sign", "sin", "erf", "clone", "contiguous", "detach", "to", "float", "double", "half", "type_as",
    "round", "floor", "ceil", "nan_to_num",
})  # fmt: skip
#: Each entry by itself, into (0, 1).
GATES = frozenset({"sigmoid", "hardsigmoid"})
#: Each entry by itself, and zero may change.
ZERO_CHANGING = frozenset({
    "softplus", "logsigmoid", "exp", "clamp", "clip", "clamp_min", "clamp_max", "pow", "log", "rsqrt", "reciprocal", "cos",
    "masked_fill", "threshold",
})  # fmt: skip
#: Entries are moved, left out or repeated.
MOVES = frozenset({
    "reshape", "view", "reshape_as", "view_as", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis",
    "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "roll", "flip",
    "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem", "select", "narrow", "index_select", "cat",
    "concat", "concatenate", "stack", "hstack", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "getattr",
    "broadcast_to", "broadcast_tensors", "ravel", "meshgrid",
})  # fmt: skip
JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack"})
#: Positions of a map are mixed, channels are not.
SPATIAL = frozenset({
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "lp_pool2d", "interpolate", "upsample", "grid_sample",
})  # fmt: skip
#: Over axes that an argument names.
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "std", "var", "norm"})
SOFTMAX = frozenset({"softmax", "log_softmax"})
SUMS = frozenset({"add", "sub", "maximum", "minimum"})
QUOTIENTS = frozenset({"truediv", "div", "true_divide"})
#: Products of two activations, as attention forms them.
PRODUCTS_OF_MATRICES = frozenset({
    "matmul", "mm", "bmm", "baddbmm", "einsum", "tensordot", "scaled_dot_product_attention",
})  # fmt: skip
NORMALISATIONS = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"}
)
#: They ask their second argument for its shape or type alone.
LIKE_ANOTHER = frozenset({"expand_as", "type_as", "reshape_as", "view_as"})
#: Operations with weights in which no neuron is looked for.
OPAQUE = frozenset({
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv1d", "conv2d", "conv3d", "linear", "bilinear", "embedding",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "addmm", "addbmm",
    "multi_head_attention_forward", "convolution", "cdist",
})  # fmt: skip


def operation(node: fx.Node) -> str:
    """What the node does, by the name that functions and methods of PyTorch share."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
