"""The results book: questions, what measures them, and the pages that say what came out."""
