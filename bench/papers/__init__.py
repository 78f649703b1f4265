"""`python -m pysmooth.bench papers`: what papers claim, measured with pysmooth's own methods.

To add an experiment, add one file to `experiments/`; whatever is called EXPERIMENT there is found:

    '''What it is about, in a line.'''

    from ..outcome import Check, Config, Experiment, Outcome, Panel
    from ..runs import Runs, descend

    def run(config: Config) -> Outcome:
        generator = config.generator()
        runs = Runs(torch.randn(config.runs(100, 20), 10, generator=generator, dtype=F64))
        optimizer = pysmooth.ClipSGD(runs.params, 0.1, max_norm=1.0, scope="tensor")

        def step() -> None:
            runs.grad.copy_(runs.x)                  # the gradient, of all runs at once
            optimizer.step()

        curve = descend(
            config, step, lambda: runs.x.norm(dim=1), config.of(10_000, 300), "clipped"
        )
        check = Check.below("the end is near 0", float(curve.last().median()), 1e-3)
        return Outcome([Panel("a parabola", "iteration", "||x||", [curve])], [check])

    EXPERIMENT = Experiment("my-id", "A title", ("2505.20817",), "The setting, for the page.", run)

`Runs` holds S runs: rows of one matrix, tensors of one optimizer with scope="tensor", so that they
take one loop. `Workers` holds n workers of each. Quick versions (`config.quick`) run in the tests:
a few seconds each. Numbers in a Check are measured; where a claim does not hold, `why` is printed
beside it. `basis` says where a claim comes from: "paper", "recalled", or "derived" here.
"""
