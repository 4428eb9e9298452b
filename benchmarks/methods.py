"""The methods that the quality benchmarks compare: name -> settings of HqqConfig."""

METHODS = {
    "minmax": {"solver": "minmax", "balance": "none"},
    "hqq (upstream)": {"solver": "hqq", "balance": "none"},
    "joint": {"balance": "none"},
    "sinkhorn + joint (default)": {},
}
