//go:build race

package worker

// raced says that the child, too, has the race detector, which keeps memory.
const raced = true
