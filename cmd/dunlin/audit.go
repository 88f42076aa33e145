package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/dunlin/dunlin/internal/audit"
	"github.com/dunlin/dunlin/internal/strictyaml"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (c *cli) auditCommand() *cobra.Command {
	out := format("table")
	var limit uint32
	list := &cobra.Command{
		Use:   "list",
		Short: "Show the newest records: who did what, and what was refused",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.audit().ListAudit, &dunlinv1.ListAuditRequest{Limit: limit, Newest: true})
			if err != nil {
				return fmt.Errorf("list audit records: %w", err)
			}
			return c.print(out, res, func() *table { return auditTable(time.Now(), res.GetRecords()) })
		},
	}
	list.Flags().Uint32Var(&limit, "limit", 100, "the most records to show, 1 to 1000")
	list.Flags().VarP(&out, "output", "o", "how to write it")

	export := &cobra.Command{
		Use:   "export",
		Short: "Write all records that are kept as JSON lines, oldest first",
		Long: `export writes a line with the points before the oldest and at the newest record,
and then a line for each record. "dunlin audit verify FILE" checks such a file.`,
		Example: "  dunlin audit export > audit.jsonl",
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			log, err := fetchLog(cmd.Context(), ctl)
			if err == nil {
				err = log.write(c.out)
			}
			if err != nil {
				return fmt.Errorf("export audit records: %w", err)
			}
			return nil
		},
	}

	var head string
	verify := &cobra.Command{
		Use:   "verify [FILE]",
		Short: "Check that no record was removed, edited, moved or put in",
		Long: `verify computes the chain of hashes of the controller's audit log, or of a FILE
that export wrote, and prints how many records it has, the point before the
oldest that is kept (anchor), and the newest point (head). It exits 1 where the
chain is broken, and names the first record that is wrong.

A log that was written anew from its beginning is whole by itself. So the head
that was seen last is kept for each controller (dunlin/audit-heads.yaml in the
user's folder of settings), and must be in the chain the next time. --head gives
another one that must be, such as one that was written down elsewhere.`,
		Args: arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var known []audit.Point
			if cmd.Flags().Changed("head") {
				p, err := audit.ParsePoint(head)
				if err != nil {
					return usagef("--head: %s", err.Error())
				}
				known = append(known, p)
			}
			if len(args) == 1 {
				return c.verifyFile(args[0], known)
			}
			return c.verifyController(cmd.Context(), known)
		},
	}
	verify.Flags().StringVar(&head, "head", "", "a point, NUMBER:HASH, that must be in the chain")
	return group("audit", "Show and check who did what", list, export, verify)
}

func auditTable(now time.Time, records []*dunlinv1.AuditRecord) *table {
	t := &table{header: []string{"NUMBER", "WHEN", "WHO", "FROM", "ACTION", "OBJECT", "COUNT", "REFUSED", "REASON"}}
	for _, r := range records {
		refused := ""
		if r.GetRefused() {
			refused = "refused"
		}
		t.add(fmt.Sprint(r.GetNumber()), ago(now, r.GetAt()), r.GetWho(), r.GetFrom(), r.GetAction(), r.GetObject(), fmt.Sprint(r.GetCount()), refused, r.GetReason())
	}
	return t
}

// auditLog is an audit log as it is read, once.
type auditLog struct {
	anchor, head audit.Point // of which its source says so
	records      iter.Seq2[*dunlinv1.AuditRecord, error]
}

// fetchLog reads the log of a controller, as long as it is now, page by page.
func fetchLog(ctx context.Context, ctl *client) (*auditLog, error) {
	page, err := call(ctx, ctl.audit().ListAudit, &dunlinv1.ListAuditRequest{})
	if err != nil {
		return nil, err
	}
	if len(page.GetAnchor()) != len(audit.Point{}.Hash) || len(page.GetHead()) != len(audit.Point{}.Hash) {
		return nil, errors.New("the controller does not say where its audit log begins and ends")
	}
	log := &auditLog{
		anchor: audit.Point{Number: page.GetAnchorNumber(), Hash: [32]byte(page.GetAnchor())},
		head:   audit.Point{Number: page.GetHeadNumber(), Hash: [32]byte(page.GetHead())},
	}
	log.records = func(yield func(*dunlinv1.AuditRecord, error) bool) {
		for len(page.GetRecords()) > 0 {
			var last uint64
			for _, r := range page.GetRecords() {
				if last = r.GetNumber(); last > log.head.Number || !yield(r, nil) {
					return
				}
			}
			next, err := call(ctx, ctl.audit().ListAudit, &dunlinv1.ListAuditRequest{After: last})
			if err == nil && next.GetAnchorNumber() > last {
				err = errors.New("the oldest records were forgotten meanwhile: run it again")
			}
			if err != nil {
				yield(nil, err)
				return
			}
			page = next
		}
	}
	return log, nil
}

// ends is the first line of an exported log.
type ends struct {
	Anchor string `json:"anchor"`
	Head   string `json:"head"`
}

func (l *auditLog) write(w io.Writer) error {
	b := bufio.NewWriter(w)
	if err := json.NewEncoder(b).Encode(ends{l.anchor.String(), l.head.String()}); err != nil {
		return err
	}
	for r, err := range l.records {
		if err != nil {
			return err
		}
		text, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(r)
		if err != nil {
			return err
		}
		var line bytes.Buffer
		if err := json.Compact(&line, text); err != nil { // protojson varies its spaces
			return err
		}
		line.WriteByte('\n')
		if _, err := b.Write(line.Bytes()); err != nil {
			return err
		}
	}
	return b.Flush()
}

// maxAuditLine bounds a line of an exported log: two texts of 64 KiB of which
// each byte is escaped, and the rest.
const maxAuditLine = 1 << 20

// readLog reads what write wrote.
func readLog(r io.Reader) (*auditLog, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxAuditLine)
	var e ends
	if !lines.Scan() {
		return nil, errors.Join(errors.New("there is no first line"), lines.Err())
	}
	first := json.NewDecoder(bytes.NewReader(lines.Bytes()))
	first.DisallowUnknownFields()
	err := first.Decode(&e)
	log := &auditLog{}
	if err == nil {
		log.anchor, err = audit.ParsePoint(e.Anchor)
	}
	if err == nil {
		log.head, err = audit.ParsePoint(e.Head)
	}
	if err != nil {
		return nil, fmt.Errorf("line 1 does not say where the log begins and ends, as \"dunlin audit export\" writes it: %w", err)
	}
	log.records = func(yield func(*dunlinv1.AuditRecord, error) bool) {
		for n := 2; lines.Scan(); n++ {
			record := &dunlinv1.AuditRecord{}
			err := protojson.Unmarshal(lines.Bytes(), record)
			if err != nil {
				err = fmt.Errorf("line %d is not an audit record: %w", n, err)
			}
			if !yield(record, err) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(nil, err)
		}
	}
	return log, nil
}

// verify checks a log and says what it is; name is what it is of.
func (c *cli) verify(name string, log *auditLog, known []audit.Point) error {
	for _, k := range known {
		if k.Number < log.anchor.Number {
			return fmt.Errorf("%s: record %d cannot be checked: those up to %d were forgotten", name, k.Number, log.anchor.Number)
		}
	}
	head, err := audit.Verify(log.anchor, log.records, append(known, log.head)...)
	if err == nil && head != log.head {
		err = fmt.Errorf("it ends at record %d, and should at %d", head.Number, log.head.Number)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	fmt.Fprintf(c.out, "records %d\nanchor  %s\nhead    %s\n", head.Number-log.anchor.Number, log.anchor, head)
	return nil
}

func (c *cli) verifyFile(path string, known []audit.Point) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	log, err := readLog(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return c.verify(path, log, known)
}

func (c *cli) verifyController(ctx context.Context, known []audit.Point) error {
	ctl, err := c.client()
	if err != nil {
		return err
	}
	path, heads, err := readHeads()
	if err != nil {
		return err
	}
	log, err := fetchLog(ctx, ctl)
	if err != nil {
		return fmt.Errorf("read the audit log: %w", err)
	}
	seen, remembered := audit.Point{}, heads[ctl.URL]
	if remembered != "" {
		if seen, err = audit.ParsePoint(remembered); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if seen.Number >= log.anchor.Number {
			known = append(known, seen)
		} else {
			fmt.Fprintf(c.err, "The head that was seen last, record %d, is forgotten: nothing says that the records after it are those that were written.\n", seen.Number)
		}
	}
	if err := c.verify(ctl.URL, log, known); err != nil {
		if remembered != "" {
			fmt.Fprintf(c.err, "The head that was seen last is in %s.\n", path)
		}
		return err
	}
	heads[ctl.URL] = log.head.String()
	return writePrivate(path, heads)
}

// readHeads gives the file of the heads that were seen last, and its content
// by controller.
func readHeads() (path string, heads map[string]string, err error) {
	if path, err = settingsPath(); err != nil {
		return "", nil, err
	}
	path = filepath.Join(filepath.Dir(path), "audit-heads.yaml")
	b, err := readPrivate(path)
	if err != nil {
		return path, nil, err
	}
	if err := strictyaml.Decode(b, &heads); err != nil {
		return path, nil, fmt.Errorf("%s is not valid: %w", path, err)
	}
	if heads == nil { // an empty file, or none
		heads = map[string]string{}
	}
	return path, heads, nil
}
