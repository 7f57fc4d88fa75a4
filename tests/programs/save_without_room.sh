# In a mount namespace of its own: save_without_room.sh PYTHON FOLDER BASE HOW
# Saves twice onto a disk of 8 MiB, which has no room for the second checkpoint.
mount -t tmpfs -o size=8m none "$2" && exec "$1" "$(dirname "$0")/save_without_room.py" "$2" "$3" "$4"
