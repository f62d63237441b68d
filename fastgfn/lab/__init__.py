"""The exactness laboratory: enumerable problems with exact posteriors, and what training makes of them."""
