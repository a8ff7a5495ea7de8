// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Proofs of RFC 6962 trees
/// @notice SHA-256, leaves prefixed 0x00 and inner nodes 0x01, so that neither passes for the other. The algorithms are
/// those of RFC 9162, 2.1.3.2 and 2.1.4.2. A proof is at most 64 hashes, because a size has 64 bits and a proof with a
/// hash too many is refused.
library RFC6962 {
    /// @notice SHA-256(0x00 ‖ leaf).
    function leafHash(bytes calldata leaf) internal pure returns (bytes32) {
        return sha256(bytes.concat(hex"00", leaf));
    }

    /// @notice Whether the leaf with this hash has this place in the tree.
    function includes(bytes32 root, uint64 size, uint64 index, bytes32 leaf, bytes32[] calldata proof)
        internal
        pure
        returns (bool)
    {
        if (index >= size) return false;
        uint256 place = index;
        uint256 last = size - 1;
        bytes32 hash = leaf;
        for (uint256 i = 0; i < proof.length; ++i) {
            if (last == 0) return false;
            if (place & 1 == 1 || place == last) {
                hash = _node(proof[i], hash);
                while (place & 1 == 0 && place != 0) {
                    place >>= 1;
                    last >>= 1;
                }
            } else {
                hash = _node(hash, proof[i]);
            }
            place >>= 1;
            last >>= 1;
        }
        return last == 0 && hash == root;
    }

    /// @notice Whether the tree (size1, root1) is the beginning of the tree (size2, root2). From size 0: false.
    function extends(uint64 size1, bytes32 root1, uint64 size2, bytes32 root2, bytes32[] calldata proof)
        internal
        pure
        returns (bool)
    {
        if (size1 == 0 || size1 > size2) return false;
        if (size1 == size2) return proof.length == 0 && root1 == root2;

        uint256 place = size1 - 1;
        uint256 last = size2 - 1;
        while (place & 1 == 1) {
            place >>= 1;
            last >>= 1;
        }
        // The first tree is a complete subtree of the second exactly if nothing is left of it: then the proof leaves its root out.
        uint256 next = place == 0 ? 0 : 1;
        if (proof.length < next) return false;
        bytes32 first = place == 0 ? root1 : proof[0];
        bytes32 second = first;
        for (; next < proof.length; ++next) {
            if (last == 0) return false;
            bytes32 sibling = proof[next];
            if (place & 1 == 1 || place == last) {
                first = _node(sibling, first);
                second = _node(sibling, second);
                while (place & 1 == 0 && place != 0) {
                    place >>= 1;
                    last >>= 1;
                }
            } else {
                second = _node(second, sibling);
            }
            place >>= 1;
            last >>= 1;
        }
        return last == 0 && first == root1 && second == root2;
    }

    function _node(bytes32 left, bytes32 right) private pure returns (bytes32) {
        return sha256(abi.encodePacked(hex"01", left, right));
    }
}
