# What the long experiments share, so that they can be stopped at will, go on over days and machines, and use two shells at
# once. Sourced, with R set (the runs, weights and all) and K (what the repository keeps of each: all but completions, weights).

lock() {  # NAME FUNCTION...: in a shell of its own, unless another one is at it (start: waits for it)
    mkdir -p $R/locks
    (flock $([ "$1" = start ] || echo --nonblock) 9 || exit 0; "${@:2}") 9> $R/locks/$1
}

finished() { [ -e $R/$1/result.json ]; }

keep() {  # NAME FILE...: copy what is small; the last one says that all are there
    mkdir -p $K/$1
    for file in "${@:2}"; do cp $R/$1/$file.json* $K/$1; done
}
