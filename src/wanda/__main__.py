from wanda.cli import main

main()
