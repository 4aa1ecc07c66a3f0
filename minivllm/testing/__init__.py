"""What tests and benchmarks share: named shapes, float64 references, tolerances, and the only timer.

Importing this package needs NumPy alone. Each module is imported by its own name:

    shapes      the model shapes and the edge shapes, each with its reason
    reference   every op in float64, in every rounding
    models      whole models of transformers with random weights; needs torch and transformers
    numeric     one tolerance formula, error figures, and an assertion that names the first bad coordinate
    timing      the clock
    points      calls of every op at a grid of shapes, tokens and dtypes
    regret      how much longer the chosen kernel of such a call takes than the best one
"""
