"""The faults of test_planted_faults.py in the batch norms of clusters, as arguments of ``Fault``."""

FORWARD, SHARED, BACKWARD = "cuda/bn_cluster_kernel.cu", "cuda/device/bn_cluster.cuh", "cuda/bn_cluster_backward_kernel.cu"
HALF = {"dtype": "torch.float16"}
EIGHT = {"name": "bn_act_train", "shape": "eight blocks of slices of 32 channels, fewer rows in the last one", **HALF}
EIGHT_BACKWARD, ENDS = EIGHT | {"name": "bn_act_backward"}, {"name": "bn_add_act_backward", **HALF, "two_parts": True}
FAULTS = [
    ("other blocks' sums are read before they are there", SHARED, "  sync_cluster(plan.cluster);", "  __syncthreads();",
     "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("a block ends while its sums are read", FORWARD, "  wait_for_cluster(p.plan.cluster);", "",
     "test_the_budget_is_kept", EIGHT),
    ("a block ends while its gradients' sums are read", BACKWARD, "  wait_for_cluster(p.plan.cluster);", "",
     "test_the_budget_is_kept", EIGHT_BACKWARD),
    ("the last block is not merged", SHARED, "merged(plan.cluster,", "merged(plan.cluster - 1,",
     "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("each block has statistics of its own", SHARED, "of_block(s.block[w][own.in_slice], rank)",
     "s.block[w][own.in_slice]", "test_the_budget_is_kept", EIGHT_BACKWARD, "bn_cluster_backward_kernel"),
    ("some threads' sums are not merged", SHARED, "row < kThreads / plan.vectors; row", "row < 32; row",
     "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("threads' sums are read before all are there", SHARED,
     "sizeof(T) / sizeof(double);\n  const int channels = plan.vectors * kClusterVec, parts = kThreads / channels;\n"
     "  __syncthreads();",
     "sizeof(T) / sizeof(double);\n  const int channels = plan.vectors * kClusterVec, parts = kThreads / channels;",
     "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("no tail behind the last whole batch", SHARED, "if (first + i < count_) use(i, first + i);",
     "if (first + kClusterBatch <= count_) use(i, first + i);", "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("the last block has as many rows as the others", SHARED, "(left < plan.share ? left : plan.share)",
     "plan.share", "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("a slice goes beyond the last channel", SHARED, "own > 0 && has_channel(plan)", "own > 0",
     "test_the_budget_is_kept",
     EIGHT | {"shape": "slices of 16 channels, half of the last one"}, "bn_cluster_kernel"),
    ("vectors are read while they are being copied", SHARED, "wait_for_copies<kBatchesAhead - 1>();",
     "wait_for_copies<kBatchesAhead>();", "test_the_budget_is_kept", EIGHT, "bn_cluster_kernel"),
    ("no vectors are copied but those on their way at first", SHARED, "use(i, first + i);\n      ask();",
     "use(i, first + i);\n      commit_copies();", "test_the_budget_is_kept",
     EIGHT | {"shape": "more vectors than are on their way"}, "bn_cluster_kernel"),
    ("a cluster's mean is not moved back by its pivot", FORWARD, "s.table[kPivotRow][own.in_slice] + whole.mean(0)",
     "whole.mean(0)", "test_statistics_are_accurate_in_clusters", HALF),
    ("a cluster's statistics about zero", FORWARD, "return mean * mean > 16.0f * var ? mean : 0.0f;", "return 0.0f;",
     "test_statistics_are_accurate_in_clusters", {"dtype": "torch.float32"}),
    ("the mask of what is not yet activated", FORWARD, "p.bn.relu ? gpu_relu(z) : z", "p.bn.relu ? gpu_relu(z) : z;\n"
     "          z = to_float(x_in[i].v[j]), out[j] = p.bn.relu && !(z > 0.0f) ? 0.0f : out[j]",
     "test_forward_has_the_bits_of_two_passes", {"name": "bn_add_act_train", **HALF}),
    ("grad_y is held unmasked", BACKWARD, "held.grad_y.set(slot, out);", "",
     "test_backward_is_exact_on_small_integers", ENDS),
    ("x and grad_y are held in one place", BACKWARD, "plan.slots * kThreads * kClusterVec * sizeof(scalar_t)", "0",
     "test_backward_is_exact_on_small_integers", ENDS),
]  # fmt: skip
