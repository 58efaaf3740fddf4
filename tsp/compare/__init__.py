"""Compare the finished jobs of an experiment: tables, a verdict in words, figures, and one page that holds them all.

    comparison = compare(finished_jobs(root, "demo"), by=("method", "transfer", "num_drop"))   # groups.py
    draw(comparison, folder)                                                                   # figures.py
    write_report(comparison, Path("demo.html"))                                                # page.py
    log_comparison(comparison, tracker, folder)                                                # outputs.py

`measures.py` says which numbers of a result are compared, `rows.py` which jobs are repetitions of each other,
`significance.py` what is more than chance, `groups.py` what may be compared at all, `verdict.py` who won.
"""
