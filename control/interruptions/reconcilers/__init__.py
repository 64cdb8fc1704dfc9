"""Loops that turn "eventually" into a number: one file each, with its interval, its limit and their reasons.

Every loop is level-triggered: it reads tables and the cloud, never memory, so any of them may die anywhere and run in
any number of workers.
"""
