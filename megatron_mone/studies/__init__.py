"""Questions about MoNE that training answers, each repeatable by one command.

    a study's file (catalogue/) -> cells, each trained once a seed (runs) -> results.json (document)
                                -> differences with intervals (statistics) -> one page (page)

Every number of a page is of the JSON beside it. A run has its place by what it is made from, so
that studies share it and nothing is trained twice.
"""
