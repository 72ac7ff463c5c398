package layer

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// The xattrs that are POSIX ACLs.
const (
	accessACL  = "system.posix_acl_access"
	defaultACL = "system.posix_acl_default" // of what is made in a directory
)

func isACL(name string) bool { return name == accessACL || name == defaultACL }

// Of Linux's posix_acl_xattr.h: a header with the version, and entries of a tag, permissions and the ID of a user or group.
const (
	aclVersion = 2
	aclHeader  = 4
	aclEntry   = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// settleACLs makes of an inode's ACLs what they are when containerd's applier has set them, and after that the mode: what the mode says goes
// into the ACL, so that none grants more. An ACL that says nothing else is none, and what the kernel refuses is an error.
func settleACLs(in *Inode) error {
	if !in.hasACL() {
		return nil
	}
	kept := make([]Xattr, 0, len(in.Xattrs))
	for _, x := range in.Xattrs {
		if isACL(x.Name) {
			acl, err := settleACL(x, in.Mode)
			if err != nil {
				return err
			}
			if acl == nil {
				continue
			}
			x.Value = acl
		}
		kept = append(kept, x)
	}
	in.Xattrs = kept
	return nil
}

// settleACL returns what is left of an ACL, nil for none.
func settleACL(x Xattr, mode uint32) ([]byte, error) {
	le, invalid := binary.LittleEndian, fmt.Errorf("%w: xattr %s is no ACL", ErrAttr, x.Name)
	switch {
	case len(x.Value) == 0:
		return nil, nil
	case len(x.Value) < aclHeader:
		return nil, invalid
	case le.Uint32(x.Value) != aclVersion:
		return nil, nil // not supported, which the applier takes for none
	case (len(x.Value)-aclHeader)%aclEntry != 0:
		return nil, invalid
	case len(x.Value) == aclHeader:
		return nil, nil
	}
	acl := slices.Clone(x.Value)
	put := func(perm []byte, bits uint32) {
		if x.Name == accessACL {
			le.PutUint16(perm, uint16(bits&7))
		}
	}
	// As posix_acl_valid() has it: each tag may come after some others.
	last, named := 0, false
	var group []byte // the permissions that are the mode's for the group: the mask's, if there is one
	for e := acl[aclHeader:]; len(e) > 0; e = e[aclEntry:] {
		tag, perm := int(le.Uint16(e)), e[2:4]
		ok := le.Uint16(perm) <= 7
		switch tag {
		case aclUserObj:
			ok = ok && last == 0
			put(perm, mode>>6)
		case aclUser, aclGroup:
			ok = ok && (last == tag || last == tag>>1) && le.Uint32(e[4:]) != ^uint32(0)
			named = true
		case aclGroupObj:
			ok = ok && (last == aclUserObj || last == aclUser)
			group = perm
		case aclMask:
			ok = ok && (last == aclGroupObj || last == aclGroup)
			group = perm
		case aclOther:
			ok = ok && (last == aclMask || last == aclGroupObj && !named)
			put(perm, mode)
		default:
			ok = false
		}
		if !ok {
			return nil, invalid
		}
		last = tag
	}
	if last != aclOther {
		return nil, invalid
	}
	if x.Name == accessACL && len(acl) == aclHeader+3*aclEntry {
		return nil, nil // it says what the mode does
	}
	put(group, mode>>3)
	return acl, nil
}
