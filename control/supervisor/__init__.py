"""`cloudoptim up`: everything on one machine, started in order, watched, stopped without a trace.

supervisord (package `supervisor`) runs, restarts and logs the processes: long maintained, pure Python, one process of
about 25 MB; circus brings ZeroMQ and tornado for the same, honcho restarts nothing.
"""
