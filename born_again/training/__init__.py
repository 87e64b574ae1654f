"""Training one generation: arguments, trainers, their checks, and workarounds for upstream."""
