"""Single operations, by the catalogue; the fixture checks before it times."""


def test_kernel(bench, workload, provider):
    bench(workload, provider)
