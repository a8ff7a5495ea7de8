// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Heads of receipt logs, one compare-and-set each
/// @notice A log is an RFC 6962 tree (SHA-256) of receipts. Its id is the hash of its initialisation, so that whoever
/// knows the id knows the keys; only the newest size and root are kept, history is in the events.
interface IAttributionLog {
    /// @notice What a log's id is the hash of.
    /// @param originHash SHA-256 of the tagged C2SP origin line
    /// @param signer address of the key that signs the receipts
    /// @param checkpointKey Ed25519 public key that signs the checkpoints
    /// @param nonce 32 random bytes
    /// @param predecessor id of the log that this one follows, or zero
    struct LogInit {
        bytes32 originHash;
        address signer;
        bytes32 checkpointKey;
        bytes32 nonce;
        bytes32 predecessor;
    }

    /// @notice A log was registered, once and for good.
    event LogRegistered(bytes32 indexed logId, address indexed owner, address submitter, address payee);
    /// @notice The log's owner named who may anchor; zero closes the log until another is named.
    event SubmitterChanged(bytes32 indexed logId, address submitter);
    /// @notice The head moved from `previousSize` leaves to `size` leaves with this root.
    event Anchored(bytes32 indexed logId, uint64 size, bytes32 root, uint64 previousSize);

    /// @notice This log is registered already.
    error LogAlreadyRegistered(bytes32 logId);
    /// @notice The signature is not the receipt signer's over this registration.
    error InvalidRegistrationSignature();
    /// @notice A log needs somebody who earns the node's part.
    error ZeroPayee();
    /// @notice The caller is not the log's owner.
    error NotLogOwner(bytes32 logId, address caller);
    /// @notice The caller may not anchor this log.
    error NotSubmitter(bytes32 logId, address caller);
    /// @notice The head is another than the caller believes.
    error HeadMoved(bytes32 logId, uint64 size, bytes32 root);
    /// @notice A log only grows.
    error SizeNotGrowing(uint64 previousSize, uint64 size);
    /// @notice No tree has this root.
    error ZeroRoot();

    /// @notice Registers a log; the caller becomes its owner.
    /// @param init what the log's id is the hash of
    /// @param submitter who may anchor; may be zero, and the owner may change it
    /// @param payee who earns the node's part of this log's receipts, for good
    /// @param signature 65 bytes r ‖ s ‖ v by `init.signer` over the EIP-712
    /// Registration(bytes32 logId,address owner,address submitter,address payee)
    function registerLog(LogInit calldata init, address submitter, address payee, bytes calldata signature) external;

    /// @notice Names who may anchor from now on. Only for the log's owner.
    /// @param logId the log
    /// @param submitter the new submitter; zero closes the log until another is named
    function setSubmitter(bytes32 logId, address submitter) external;

    /// @notice Moves the head, if it is where the caller believes it is. Only for the log's submitter.
    /// @param logId the log
    /// @param previousSize the size of the head to replace; 0 before the first anchor
    /// @param previousRoot the root of the head to replace; zero before the first anchor
    /// @param size number of leaves, more than before
    /// @param root RFC 6962 root of that many leaves
    function anchor(bytes32 logId, uint64 previousSize, bytes32 previousRoot, uint64 size, bytes32 root) external;

    /// @notice The newest anchored head; all zero for a log that is not registered.
    /// @param logId the log
    /// @return size number of leaves
    /// @return root RFC 6962 root of them
    /// @return submitter who may anchor
    function headOf(bytes32 logId) external view returns (uint64 size, bytes32 root, address submitter);

    /// @notice The log's owner; zero if the log is not registered.
    /// @param logId the log
    /// @return owner the account that registered it
    function ownerOf(bytes32 logId) external view returns (address owner);

    /// @notice The id of a log: SHA-256 of abi.encode(uint16 0x0301, bytes32 0, init).
    /// @param init the log's initialisation
    /// @return logId its id
    function logIdOf(LogInit calldata init) external pure returns (bytes32 logId);

    /// @notice Whether a leaf is in a tree (RFC 9162, 2.1.3.2).
    /// @param root root of the tree
    /// @param size its number of leaves
    /// @param index the leaf's place, from 0
    /// @param leaf the leaf's bytes, not its hash
    /// @param proof hashes from the leaf upwards
    /// @return valid true if the proof has exactly the right length and leads to the root
    function verifyInclusion(bytes32 root, uint64 size, uint64 index, bytes calldata leaf, bytes32[] calldata proof)
        external
        pure
        returns (bool valid);

    /// @notice Whether a tree is the beginning of another (RFC 9162, 2.1.4.2). From size 0 nothing is proven: false.
    /// @param size1 leaves of the earlier tree
    /// @param root1 its root
    /// @param size2 leaves of the later tree
    /// @param root2 its root
    /// @param proof the consistency proof; empty if the sizes are equal
    /// @return valid true if the proof has exactly the right length and leads to both roots
    function verifyConsistency(uint64 size1, bytes32 root1, uint64 size2, bytes32 root2, bytes32[] calldata proof)
        external
        pure
        returns (bool valid);
}
