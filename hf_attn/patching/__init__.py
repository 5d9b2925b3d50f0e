"""Changes made in place to models of other libraries."""
