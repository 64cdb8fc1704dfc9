"""Customers: onboarding, verification of their AWS role, configuration."""
