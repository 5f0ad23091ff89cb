from fleet_worker.cli import main

main()
