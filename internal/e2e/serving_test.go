package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/examples/digits"
)

// alone starts an agent that serves digits version 2 by itself.
func alone(t *testing.T, args ...string) *Alone {
	t.Helper()
	dir := t.TempDir()
	raw, err := digits.Models.ReadFile("v2.onnx")
	if err != nil {
		t.Fatal(err)
	}
	model := filepath.Join(dir, "digits.onnx")
	if err := os.WriteFile(model, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := Serve(within(t), programs.Agent, dir, "alone", library, append(args, model)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Stop(); err != nil {
			t.Errorf("%v\n%s", err, a.LogTail(30))
		}
	})
	if err := a.Ready(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, a.LogTail(30))
	}
	return a
}

// latencies classifies with 4 clients, one request after the other each, and
// gives the 99th percentile.
func latencies(t *testing.T, url string, requests int) time.Duration {
	t.Helper()
	const clients = 4
	images, _ := digits.HeldOut()
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for n := range requests / clients {
				start := time.Now()
				_, err := Classify(t.Context(), url, "digits", images[(c+n)%500:][:1])
				took := time.Since(start)
				mu.Lock()
				all = append(all, took)
				mu.Unlock()
				if err != nil {
					t.Errorf("request %d: %v", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	slices.Sort(all)
	return all[len(all)*99/100]
}

// disturbed holds the latency of requests with and without a disturbance
// against each other, in turns: the machine may be busy with other things.
func disturbed(t *testing.T, url string, begin func() (end func())) {
	t.Helper()
	const rounds, requests = 5, 600
	var quiet, busy []time.Duration
	latencies(t, url, requests/4) // warm
	for range rounds {
		quiet = append(quiet, latencies(t, url, requests))
		end := begin()
		busy = append(busy, latencies(t, url, requests))
		end()
	}
	t.Logf("99th percentile quiet: %v", quiet)
	t.Logf("99th percentile disturbed: %v", busy)
	slices.Sort(quiet)
	slices.Sort(busy)
	if b, q := busy[rounds/2], quiet[rounds/2]; b > 2*q {
		t.Errorf("the median of the 99th percentiles is %v, more than twice the %v without disturbance", b, q)
	}
}

func open(t *testing.T, url string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func TestIdleConnections(t *testing.T) {
	const connections = 10_000
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Max < connections+connections/2 {
		t.Fatalf("this test needs %d open files, the limit is %d (%v): raise it with ulimit -n", connections+connections/2, limit.Max, err)
	}
	a := alone(t)
	var idle []*net.TCPConn
	drop := func() {
		for _, c := range idle {
			_ = c.SetLinger(0) // no TIME_WAIT: the next round needs the ports
			c.Close()
		}
		idle = nil
	}
	defer drop()
	// One round: the connections stay while the quiet half of the next rounds
	// would be measured, so they come and go with each.
	disturbed(t, a.URL, func() func() {
		for range connections {
			c := open(t, a.URL)
			idle = append(idle, c)
			if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, "GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range idle { // each is answered, and stays
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || resp.StatusCode != http.StatusOK {
				t.Fatalf("an idle connection: %v %v", resp, err)
			}
		}
		return drop
	})
}

// Clients that ask for large answers and read none of them.
func TestSlowReaders(t *testing.T) {
	a := alone(t)
	images, _ := digits.HeldOut()
	data := make([]byte, 0, 256*500*20)
	for range 20 {
		for _, image := range images[:500] {
			data = appendFloats(data, image[:])
		}
	}
	header := fmt.Sprintf(`{"parameters":{"binary_data_output":true},"inputs":[{"name":"image","datatype":"FP32","shape":[%d,1,8,8],"parameters":{"binary_data_size":%d}}]}`, len(data)/256, len(data))
	disturbed(t, a.URL, func() func() {
		var slow []*net.TCPConn
		for range 20 {
			c := open(t, a.URL)
			slow = append(slow, c)
			_ = c.SetReadBuffer(4 << 10)
			fmt.Fprintf(c, "POST /v2/models/digits/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n%s", len(header), len(header)+len(data), header)
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range slow { // its run is over when the answer begins
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		return func() {
			for _, c := range slow {
				c.Close()
			}
		}
	})
}

// Clients that leave in the middle of a request or of its answer.
func TestVanishingClients(t *testing.T) {
	a := alone(t)
	disturbed(t, a.URL, func() func() {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for n := 0; ctx.Err() == nil; n++ {
				c, err := net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
				if err != nil {
					t.Error(err)
					return
				}
				fmt.Fprintf(c, "POST /v2/models/digits/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: 0\r\nContent-Length: 256\r\n\r\n")
				_, _ = c.Write(make([]byte, []int{0, 100, 256}[n%3]))
				_ = c.(*net.TCPConn).SetLinger(0)
				c.Close()
				select {
				case <-ctx.Done():
				case <-time.After(time.Millisecond):
				}
			}
		}()
		return func() {
			cancel()
			<-done
		}
	})
}

// Readiness fails when nothing can be run any more, though the port answers.
func TestReadinessTellsTheTruth(t *testing.T) {
	a := alone(t)
	// The worker process stands still: it neither dies nor answers.
	workers := children(t, a.PID())
	if len(workers) != 1 {
		t.Fatalf("%d child processes", len(workers))
	}
	if err := syscall.Kill(workers[0], syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan struct{})
	images, _ := digits.HeldOut()
	go func() {
		defer close(asked)
		_, _ = Classify(ctx, a.URL, "digits", images[:1])
	}()
	err := a.Wait(within(t), func(ctx context.Context) error {
		if get(ctx, a.URL+"/v2/health/ready") == nil {
			return fmt.Errorf("is ready")
		}
		return get(ctx, a.URL+"/v2/health/live")
	})
	if err != nil {
		t.Errorf("while a run stands still: %v", err)
	}
	if err := syscall.Kill(workers[0], syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := a.Ready(within(t)); err != nil {
		t.Errorf("after it went on: %v", err)
	}
	cancel()
	<-asked
}

// children gives the child processes of a process.
func children(t *testing.T, pid int) []int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for f := range strings.FieldsSeq(string(b)) {
			var child int
			if _, err := fmt.Sscan(f, &child); err == nil {
				found = append(found, child)
			}
		}
	}
	return found
}
