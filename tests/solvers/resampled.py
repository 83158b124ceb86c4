"""A loop of one's own in which the batch is resampled on the way."""


def resampled(solver, denoiser, x, grid, at, idx):
    "Rows `idx` go on from step `at`; without a memory left behind, they end where they would have."
    run, times = solver.begin(denoiser.process, grid), grid.tolist()
    for i, (t, s) in enumerate(zip(times, times[1:])):
        if i == at:
            run.reindex(idx)
            x = x[idx]
        x = run.step(lambda y, u: denoiser(y, u), x, t, s)
    return x
