from scheduler import bench_plan


def test_the_bench_names_a_figure_for_every_target_it_runs():
    ticks = iter(range(10_000))
    result = bench_plan(nodes_max=40, clock=lambda: float(next(ticks)))
    assert result["figures"]["plan_40_s"] >= 1.0
    assert result["targets"] == {"plan_40_s": 1.0}
