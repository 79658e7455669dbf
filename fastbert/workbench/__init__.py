"""The kernel workbench behind ``fastbert kernels``: check, inspect, compare and tune kernels.

Nothing here runs when a model runs. Static figures come from the compiled artefact
(`fastbert.kernels._compile`); what needs a GPU says so.
"""
