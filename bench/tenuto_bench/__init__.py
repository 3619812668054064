"""tenuto-bench: real client processes against a server, one table, and answers that are checked.

main     reads the flags, runs the cases, prints the table
cases    what a case is and what came of it
clients  the client processes of a case, from the outside
loops    what a client process does: closed loops over its sessions
load     the client process with tenuto's own client
replay   computes sampled sessions again with the policy's weights and compares
served   the server that is measured: one of its own, or any address
"""
