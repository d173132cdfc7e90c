"""Updates, acting, and what agents learn."""
