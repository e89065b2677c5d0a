"""Kernels: what a backend implements, and which backend a tensor gets.

A backend is a module with four functions over a dense `(outer, group, inner)` view, and their two fusions:

    moments(x, grouping, mask)                                              -> mean, var
    normalize(x, grouping, mean, var, weight, bias, residual, mask, eps, activation) -> y
    backward_sums(dy, x, grouping, mean, var, weight, bias, residual, y, mask, eps, activation)
                                                                            -> g, dweight, dbias
    backward_input(g, x, grouping, mean, var, weight, dweight, dbias, count, eps)    -> dx

    forward  = moments, then normalize
    backward = backward_sums, then backward_input

An all-reduce (of moments going forward, of the two sums coming back) fits between the four, which is why they are
the contract; the fusions exist because one pass over memory is what a single process pays for.

    x̂ = (x − mean) / sqrt(var + eps)      z = weight · x̂ + bias + residual      y = activation(z)
    g = dy · activation'(z)               dbias = Σ g      dweight = Σ g·x̂      dresidual = g
    dx = weight / sqrt(var + eps) · (g − dbias / count − x̂ · dweight / count)

Every backend keeps this: `x`, `residual`, `y`, `dy`, `g` are dense in memory in the order (outer, group, inner), in
one dtype, and outputs come in the memory order of `x`; mean, var and the two sums are float64 (group,), but `normalize`
takes statistics of any float dtype, and `backward` gives its sums, which nothing more is computed from, in the dtypes
of weight and bias where there are any, and with anything in them where statistics were given and nobody wants them;
weight and bias are (group,) or None in any float dtype; `mask` is bool (outer, inner), True where a value is valid:
where it is False a value enters no statistic and no sum, and y, g and dx are zero whatever x holds; inputs are never
written to; a result does not depend on the number of threads.
"""

from steadynorm.kernels.backends import BACKENDS, Status, backend, choose, status
from steadynorm.kernels.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "BACKENDS", "FROM_OUTPUT", "Status", "backend", "choose", "status"]

FROM_OUTPUT = frozenset({"relu", "leaky_relu", "relu6"})
"""Activations whose derivative can be read off the output, which the next layer keeps anyway."""
