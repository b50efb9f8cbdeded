"""Engines that decode the same weights, each in a process, and an environment, of its own.

`worker.py` runs with the Python of an engine's environment, which has neither torch nor kvcomp
where the engine does not need them. So these files import what their engine brings, and nothing of
this project but `kvcomp_engine.py`. Each has a class `Engine`:

    Engine(job)            loads the model; job: model (folder), gguf (file), batch, room (tokens of
                           a sequence, at most), threads
    versions               its contenders, which are settings of the engine: of their package
    greedy(ids, count)     the tokens that each contender appends to a prompt
    stand(tokens)          all contenders stand behind so many tokens of every sequence
    step(name, count)      seconds of each of `count` steps, every one up to its greedy token
    parts(name)            ms of each part of a step, where the engine can tell
"""
