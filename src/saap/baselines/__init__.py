"""Published and naive pruning methods: their scores and rules. Search, surgery and measurements are shared."""
