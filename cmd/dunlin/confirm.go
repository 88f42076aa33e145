package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// maxAnswer bounds what is read as an answer to a question.
const maxAnswer = 1 << 10

// confirm lets a verb go on that destroys something or reaches the whole fleet:
// with --yes, or where somebody at a terminal types the name. does is what it
// does, as "this deletes route/x". Where nobody can be asked it is refused.
func (c *cli) confirm(ctx context.Context, name, does string, args ...any) error {
	if c.yes {
		return nil
	}
	does = plain(fmt.Sprintf(does, args...))
	f, ok := c.in.(*os.File)
	switch {
	case c.noInput:
		return usagef("%s: with --no-input it needs --yes", does)
	case !ok || !term.IsTerminal(int(f.Fd())):
		return usagef("%s: without a terminal to ask at it needs --yes", does)
	}
	fmt.Fprintf(c.err, "%s. Type %s to go on: ", strings.ToUpper(does[:1])+does[1:], plain(name))
	// The read cannot be woken; after an interrupt the process ends.
	answer := make(chan string, 1)
	go func() { answer <- readLine(f, maxAnswer) }()
	select {
	case <-ctx.Done():
		fmt.Fprintln(c.err)
		return ctx.Err()
	case got := <-answer:
		if strings.TrimSpace(got) != name {
			return fmt.Errorf("not confirmed; nothing was done")
		}
	}
	return nil
}

// readLine reads byte by byte, so that nothing is read beyond the line.
func readLine(r io.Reader, most int) string {
	var line []byte
	one := make([]byte, 1)
	for len(line) < most {
		n, err := r.Read(one)
		if n == 1 && one[0] != '\n' {
			line = append(line, one[0])
		}
		if err != nil || n == 1 && one[0] == '\n' {
			break
		}
	}
	return string(line)
}
