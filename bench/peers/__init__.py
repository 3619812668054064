"""tenuto beside its peers and floors: one run, in turns.

run        reads the flags, runs the contenders in turns, prints the tables
contenders who is measured, and with which server and client
servers    their servers: started, paused while another is measured, started again when they have died
processes  a process and all below it
client     the client process of every peer and of the echo
rows       what came of it: rows, ratios, tables
goals      what tenuto wants to reach, judged from the rows
*_server, triton_*  the servers themselves
"""
