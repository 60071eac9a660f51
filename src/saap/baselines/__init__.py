"""Published and naive pruning methods, as scores and rules that the same search, surgery and measurements take."""
