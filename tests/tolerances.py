"""Every parity tolerance, with its reason. Loosening one is a commit of its own."""

TOLERANCES: dict[str, tuple[float, str]] = {
    "merge-elementwise": (3e-7, "float32 sums of a few terms in another order: a few units in the last place"),
    "merge-ties-delta": (1e-6, "a difference of float32 weights against float64: the base is rounded once more"),
    "merge-iso-c": (3e-6, "float32 result of a polar factor computed in float64: rounding of the sum and the output"),
    "probe/scikit-learn": (
        1e-5,
        "probabilities of two solvers of one convex problem, each stopped at its own tolerance",
    ),
    "muon/torch": (2e-3, "bfloat16 products: batched and single matmul kernels round differently, 7 steps of lr 0.02"),
    "normuon/pytorch_optimizer": (2e-3, "bfloat16 products as for Muon; the peer batches its own way"),
    "optim/closed-form": (1e-12, "float64 with an SVD on both sides"),
    "adapters-peft": (1e-5, "float32 outputs and gradients of the same formula in another order of products"),
    "compress-svd": (1e-10, "float64 on both sides; an iterative eigensolver against LAPACK"),
    "inspect-repair": (1e-5, "the peer keeps its factors in float32 between its two decompositions"),
}
