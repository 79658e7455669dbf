"""Every workload of the chosen suite with each of its providers; see conftest.py."""


def test_workload(bench, workload, provider):
    bench(workload, provider)
