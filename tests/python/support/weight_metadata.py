"""Scale and zero of every weight of a quantized matrix."""

import numpy as np

import hqq_cpp


def metadata(q):
    """scale and zero of every weight, float64 [out, in], and col_scale [in]."""

    def values(codes, step, offset):
        codes = np.asarray(hqq_cpp.Tensor(codes).numpy(), np.float64)
        if step is None:
            return codes
        block = np.arange(codes.size) // 128
        step, offset = (np.asarray(t.numpy(), np.float64) for t in (step, offset))
        return (codes.reshape(-1) * step[block] + offset[block]).reshape(codes.shape)

    out, columns = q.shape
    scale = values(q.scale, q.scale_step, q.scale_offset)
    zero = values(q.zero, q.zero_step, q.zero_offset)
    if q.axis == 0:
        repeats = -(-out * columns // scale.size)
        scale, zero = (
            np.tile(m.reshape(-1), repeats)[: out * columns].reshape(out, columns)
            for m in (scale, zero)
        )
    else:
        group = min(q.group_size or columns, columns)
        scale, zero = (np.repeat(m, group, axis=1)[:, :columns] for m in (scale, zero))
    col_scale = np.ones(columns)
    if q.col_scale is not None:
        col_scale = np.asarray(q.col_scale.numpy(), np.float64)
    return scale, zero, col_scale
