"""One module for each engine, imported only in a worker process, whose Python may be of another environment.

Each has

    load(job) -> run         job: benchmarks.peers.worker.Job
    run(request, step)       generates greedily; calls step(ids) after each token, with the ids of all rows
    prepare(job)             only if the engine needs files of its own format: writes them to job.files
"""
