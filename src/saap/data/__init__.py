"""Texts and the token samples that are drawn from them."""
