package identity

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

// How passwords are hashed: argon2id over so many KiB, so often. It takes some
// tens of milliseconds of one core.
const (
	hashMemory = 32 << 10
	hashPasses = 2
	hashBytes  = 32
	saltBytes  = 16
)

// The limits of passwords, and of what is read of a stored one.
const (
	MinPassword = 12
	MaxPassword = 512
	maxMemory   = 64 << 10 // KiB
	maxPasses   = 16
)

// hashing bounds the passwords that are hashed at once, and so the memory that
// logins take; waiting bounds those that wait for it.
const (
	hashing = 2
	waiting = 64
)

// CheckPassword says whether somebody may have a password.
func CheckPassword(password string) error {
	if n := utf8.RuneCountInString(password); n < MinPassword || n > MaxPassword {
		return fmt.Errorf("the password has %d characters, allowed are %d to %d", n, MinPassword, MaxPassword)
	}
	return nil
}

// passwords hashes a few at a time.
type passwords struct {
	slots, line chan struct{}
}

func newPasswords() passwords {
	return passwords{slots: make(chan struct{}, hashing), line: make(chan struct{}, hashing+waiting)}
}

// errBusy says that too many wait to have a password hashed.
var errBusy = &LimitedError{Wait: time.Second, Busy: true}

// take waits for a slot, and gives what frees it.
func (p passwords) take(ctx context.Context) (func(), error) {
	select {
	case p.line <- struct{}{}:
	default:
		return nil, errBusy
	}
	select {
	case p.slots <- struct{}{}:
		return func() { <-p.slots; <-p.line }, nil
	case <-ctx.Done():
		<-p.line
		return nil, ctx.Err()
	}
}

// HashPassword gives a password in the form that is kept: argon2id, in the PHC
// string format.
func (a *Authenticator) HashPassword(ctx context.Context, password string) (string, error) {
	free, err := a.passwords.take(ctx)
	if err != nil {
		return "", err
	}
	defer free()
	var salt [saltBytes]byte
	rand.Read(salt[:]) // never fails
	return phc{memory: hashMemory, passes: hashPasses, threads: 1, salt: salt[:]}.of(password).String(), nil
}

// nobodys is compared with where there is no password, so that a user who does
// not exist takes as long as one who does.
var nobodys = phc{memory: hashMemory, passes: hashPasses, threads: 1, salt: make([]byte, saltBytes), hash: make([]byte, hashBytes)}

// Login says whether attempt has the password that is kept; "": there is no
// such user, or none with a password. Its error is ErrUnauthenticated or a
// LimitedError.
func (a *Authenticator) Login(ctx context.Context, attempt Attempt, kept string) error {
	if CheckUser(attempt.Name) != nil { // no such user can be
		attempt.Name, kept = "", ""
	}
	if err := a.guard.Check(attempt); err != nil {
		return err
	}
	free, err := a.passwords.take(ctx)
	if err != nil {
		return err
	}
	defer free()
	// Others may have been wrong meanwhile: so no more are looked at than the
	// guard allows and hash at once.
	if err := a.guard.Check(attempt); err != nil {
		return err
	}
	want := nobodys
	if kept != "" {
		if want, err = parsePHC(kept); err != nil {
			return fmt.Errorf("stored password of user %s: %w", attempt.Name, err)
		}
	}
	password := attempt.Credential
	if len(password) > utf8.UTFMax*MaxPassword {
		password = ""
	}
	got := want.of(password)
	if subtle.ConstantTimeCompare(got.hash, want.hash) != 1 || kept == "" || password == "" {
		a.guard.Wrong(attempt)
		return errWrong
	}
	a.guard.Right(attempt)
	return nil
}

// phc is a hashed password, and how it was hashed.
type phc struct {
	memory, passes uint32
	threads        uint8
	salt, hash     []byte
}

func (p phc) of(password string) phc {
	p.hash = argon2.IDKey([]byte(password), p.salt, p.passes, p.memory, p.threads, hashBytes)
	return p
}

func (p phc) String() string {
	text := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, p.memory, p.passes, p.threads, text(p.salt), text(p.hash))
}

var errPHC = errors.New("it is not argon2id in the PHC string format, within the limits of this program")

func parsePHC(s string) (phc, error) {
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" || parts[2] != "v="+strconv.Itoa(argon2.Version) {
		return phc{}, errPHC
	}
	var p phc
	if n, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &p.memory, &p.passes, &p.threads); err != nil || n != 3 {
		return phc{}, errPHC
	}
	var errSalt, errHash error
	p.salt, errSalt = base64.RawStdEncoding.Strict().DecodeString(parts[4])
	p.hash, errHash = base64.RawStdEncoding.Strict().DecodeString(parts[5])
	if errors.Join(errSalt, errHash) != nil || len(p.salt) < 8 || len(p.salt) > 64 || len(p.hash) != hashBytes ||
		p.memory < 8*uint32(p.threads) || p.memory > maxMemory || p.passes < 1 || p.passes > maxPasses || p.threads < 1 || p.threads > 4 {
		return phc{}, errPHC
	}
	if p.String() != s { // leading zeros, signs, what follows
		return phc{}, errPHC
	}
	return p, nil
}
