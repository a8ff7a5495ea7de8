// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @dev OpenZeppelin's standard Merkle tree as docs/settlement.md says it, checked against the golden vectors.
library RewardTree {
    function leafOf(address distributor, address account, uint256 cumulative) internal view returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(block.chainid, distributor, account, cumulative))));
    }

    function rootOf(bytes32[] memory leaves) internal pure returns (bytes32) {
        return leaves.length == 0 ? bytes32(0) : _nodes(leaves)[0];
    }

    /// @dev The proof of leaves[place].
    function proofOf(bytes32[] memory leaves, uint256 place) internal pure returns (bytes32[] memory proof) {
        bytes32 leaf = leaves[place];
        bytes32[] memory nodes = _nodes(leaves);
        uint256 node = nodes.length - 1;
        while (nodes[node] != leaf) --node;
        uint256 depth = 0;
        for (uint256 up = node; up > 0; up = (up - 1) / 2) {
            ++depth;
        }
        proof = new bytes32[](depth);
        for (uint256 i = 0; i < depth; ++i) {
            proof[i] = nodes[node % 2 == 0 ? node - 1 : node + 1];
            node = (node - 1) / 2;
        }
    }

    function pair(bytes32 one, bytes32 other) internal pure returns (bytes32) {
        return one < other ? keccak256(abi.encode(one, other)) : keccak256(abi.encode(other, one));
    }

    function _nodes(bytes32[] memory leaves) private pure returns (bytes32[] memory nodes) {
        uint256 length = leaves.length;
        bytes32[] memory sorted = new bytes32[](length);
        for (uint256 i = 0; i < length; ++i) {
            uint256 hole = i;
            for (; hole > 0 && sorted[hole - 1] > leaves[i]; --hole) {
                sorted[hole] = sorted[hole - 1];
            }
            sorted[hole] = leaves[i];
        }
        nodes = new bytes32[](2 * length - 1);
        for (uint256 k = 0; k < length; ++k) {
            nodes[2 * length - 2 - k] = sorted[k];
        }
        for (uint256 i = length - 1; i > 0; --i) {
            nodes[i - 1] = pair(nodes[2 * i - 1], nodes[2 * i]);
        }
    }
}
