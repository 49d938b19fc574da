"""What Ray reads in the environment when it is imported, and so not later; what a user has set there stays."""

OTHERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray listens on loopback alone; "1": it talks to other machines

VERBOSE = "ONEWARP_VERBOSE"  # ours: Ray and the workers are to be heard

QUIET = {
    OTHERS: "0",  # who joins a cluster says otherwise, first
    "RAY_ENABLE_AUTO_CONNECT": "0",  # who finds that Ray is gone must not start another
    "RAY_prestart_worker_first_driver": "0",  # processes without our environment, which nobody would use
    "RAY_USAGE_STATS_ENABLED": "0",  # no reports home
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # cluster.leaving does it
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # until failures and the end are seen; each takes time of the workers
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # for one that no longer answers, where no other waits for it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
