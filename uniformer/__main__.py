from uniformer.cli import main

main()
