"""Whole encoders, by the catalogue; the fixture checks before it times."""


def test_model(bench, workload, provider):
    bench(workload, provider)
