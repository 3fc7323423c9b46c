"""The terms of the objective: TokenStates in; a scalar, its parts and its metrics out."""
