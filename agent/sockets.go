package agent

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// socketsEnv names the listening sockets that the program before this one has
// left open: connections wait in them, and none is refused, while the agent
// changes its program.
const socketsEnv = "DUNLIN_AGENT_SOCKETS"

// socket is a listening socket that outlives the program.
type socket struct {
	address string // as the setting has it
	file    *os.File
}

// keep gives a listener's socket once more, which stays open when the listener
// is closed.
func keep(address string, l net.Listener) (socket, error) {
	t, ok := l.(*net.TCPListener)
	if !ok {
		return socket{}, fmt.Errorf("%T has no socket", l)
	}
	f, err := t.File()
	return socket{address, f}, err
}

// handOver gives the environment of a program that is to have the sockets.
func handOver(env []string, kept []socket) ([]string, error) {
	env = slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, socketsEnv+"=") })
	var all []string
	for _, s := range kept {
		fd := s.file.Fd()
		if _, err := unix.FcntlInt(fd, unix.F_SETFD, 0); err != nil { // not closed by exec
			return nil, fmt.Errorf("hand over the socket of %s: %w", s.address, err)
		}
		all = append(all, fmt.Sprintf("%d %s", fd, s.address))
	}
	if len(all) > 0 {
		env = append(env, socketsEnv+"="+strings.Join(all, ","))
	}
	return env, nil
}

// inherited gives the sockets that were handed over, once.
func inherited() (kept []socket) {
	text := os.Getenv(socketsEnv)
	if text == "" {
		return nil
	}
	os.Unsetenv(socketsEnv)
	for one := range strings.SplitSeq(text, ",") {
		number, address, _ := strings.Cut(one, " ")
		fd, err := strconv.Atoi(number)
		if err != nil || fd < 3 {
			continue
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			continue // there is no such file
		}
		kept = append(kept, socket{address, os.NewFile(uintptr(fd), address)})
	}
	return kept
}

// listenOn listens on an address, by the socket that was handed over for it
// where there is one.
func listenOn(address string, kept []socket) (l net.Listener, had bool, err error) {
	for _, s := range kept {
		if s.address == address {
			if l, err := net.FileListener(s.file); err == nil {
				return l, true, nil
			}
		}
	}
	l, err = net.Listen("tcp", address)
	return l, false, err
}
